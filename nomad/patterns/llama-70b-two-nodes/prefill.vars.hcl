# Llama-3.3-70B, a whole client of eight GPUs that prefills. Why: compose/patterns/llama-70b-two-nodes.yaml, docs/patterns.md. Parsed and checked only.
#
#     nomad job run -var-file=nomad/patterns/llama-70b-two-nodes/prefill.vars.hcl nomad/prefill.nomad.hcl
image       = "baton-prefill-sglang:latest"
model       = "/models/Llama-3.3-70B-Instruct"
served_name = "llama-3.3-70b"
count       = 1
tls         = true # SGLang's own ports have none: only clients of the workers' own network may take these jobs

# The image has Baton in /opt/venv beside SGLang's own Python (BASE_IMAGE of compose/Dockerfile, docs/patterns.md). HOME: SGLang compiles kernels
# into it and loads them; the container's /tmp cannot be executed from, the task's own folder can.
engine         = "sglang"
sglang_command = "env HOME=/local PATH=/usr/local/cuda/bin:/usr/local/bin:/usr/bin:/bin python3 -m sglang.launch_server"

# Eight GPUs are a whole client, so the scheduler puts prefill and decode on two.
gpus             = 8
rdma             = true
sglang_args      = "--tp-size 8 --disaggregation-transfer-backend nixl --mem-fraction-static 0.85 --chunked-prefill-size 4096"
max_chunk_tokens = 4096

memory           = 131072
cpu              = 64000
shm_bytes        = 17179869184
healthy_deadline = "30m"
