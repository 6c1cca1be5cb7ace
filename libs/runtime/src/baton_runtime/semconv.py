"""Every attribute and span name Baton uses, in one place.

Pinned to OpenTelemetry semantic conventions 1.37 (GenAI is "Development" there: a later release may rename; change it here).
"""

SEMCONV_SCHEMA_URL = "https://opentelemetry.io/schemas/1.37.0"

# resource
SERVICE_NAME = "service.name"
SERVICE_VERSION = "service.version"
SERVICE_INSTANCE_ID = "service.instance.id"
BATON_INCARNATION = "baton.incarnation"

# GenAI, on the frontend's `chat {model}` / `text_completion {model}` span
GEN_AI_OPERATION_NAME = "gen_ai.operation.name"
GEN_AI_PROVIDER_NAME = "gen_ai.provider.name"
GEN_AI_REQUEST_MODEL = "gen_ai.request.model"
GEN_AI_REQUEST_MAX_TOKENS = "gen_ai.request.max_tokens"
GEN_AI_REQUEST_SEED = "gen_ai.request.seed"
GEN_AI_USAGE_INPUT_TOKENS = "gen_ai.usage.input_tokens"
GEN_AI_USAGE_OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS = "gen_ai.usage.cache_read.input_tokens"
GEN_AI_RESPONSE_FINISH_REASONS = "gen_ai.response.finish_reasons"
ERROR_TYPE = "error.type"

# HTTP and RPC
HTTP_REQUEST_METHOD = "http.request.method"
HTTP_RESPONSE_STATUS_CODE = "http.response.status_code"
HTTP_ROUTE = "http.route"
URL_PATH = "url.path"
RPC_SYSTEM = "rpc.system"
RPC_METHOD = "rpc.method"

# span names of the phases
SPAN_ROUTER_SELECT = "router.select"
SPAN_PREFILL_QUEUE = "prefill.queue"
SPAN_PREFILL_EXECUTE = "prefill.execute"
SPAN_KV_BEGIN = "kv.begin"
SPAN_KV_PULL = "kv.pull"
SPAN_KV_CONFIRM = "kv.confirm"
SPAN_DECODE_QUEUE = "decode.queue"
SPAN_DECODE_GENERATE = "decode.generate"
SPAN_BOOKS_HANDOFF = "books.handoff"
EVENT_FIRST_TOKEN = "first_token"

# Baton's own
BATON_REQUEST_ID = "baton.request_id"
BATON_ATTEMPT = "baton.attempt"
BATON_INSTANCE_ID = "baton.instance_id"
BATON_PREFILL_INSTANCE_ID = "baton.prefill.instance_id"
BATON_DECODE_INSTANCE_ID = "baton.decode.instance_id"
BATON_PRIORITY = "baton.priority"
BATON_PROMPT_TOKENS = "baton.prompt_tokens"
BATON_CACHED_TOKENS = "baton.cached_tokens"
BATON_OUTPUT_TOKENS = "baton.output_tokens"
BATON_CHUNKS = "baton.chunks"
BATON_BLOCKS = "baton.blocks"
BATON_BYTES = "baton.bytes"
BATON_OPERATIONS = "baton.operations"
BATON_COPIES = "baton.copies"
BATON_GIGABYTES_PER_SECOND = "baton.gigabytes_per_second"
BATON_FIRST_BLOCK = "baton.first_block"
BATON_EXPOSED_MS = "baton.exposed_ms"
BATON_LAST_CHUNK_BYTES = "baton.last_chunk_bytes"
BATON_ROUND_TRIP_MS = "baton.round_trip_ms"
BATON_TRANSPORT = "baton.transport"
BATON_TRANSPORT_REASON = "baton.transport_reason"
BATON_RETRIES = "baton.retries"
BATON_OUTCOME = "baton.outcome"
BATON_QUEUE_US = "baton.queue_us"
BATON_PREDICTED_QUEUE_US = "baton.predicted_queue_us"
BATON_PREDICTED_PREFILL_US = "baton.predicted_prefill_us"
BATON_PREDICTED_TRANSFER_US = "baton.predicted_transfer_us"
