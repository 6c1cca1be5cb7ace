# Llama-3.3-70B, a whole client of eight GPUs that decodes. Why: prefill.vars.hcl, compose/patterns/llama-70b-two-nodes.yaml. Parsed and checked only.
#
#     nomad job run -var-file=nomad/patterns/llama-70b-two-nodes/decode.vars.hcl nomad/decode.nomad.hcl
image       = "baton-decode-sglang:latest"
model       = "/models/Llama-3.3-70B-Instruct"
served_name = "llama-3.3-70b"
count       = 1
tls         = true

# The image has Baton in /opt/venv beside SGLang's own Python (BASE_IMAGE of compose/Dockerfile, docs/patterns.md). HOME: SGLang compiles kernels
# into it and loads them; the container's /tmp cannot be executed from, the task's own folder can.
engine         = "sglang"
sglang_command = "env HOME=/local PATH=/usr/local/cuda/bin:/usr/local/bin:/usr/bin:/bin python3 -m sglang.launch_server"

gpus        = 8
rdma        = true
can_prefill = false
sglang_args = "--tp-size 8 --disaggregation-transfer-backend nixl --mem-fraction-static 0.85 --num-reserved-decode-tokens 512"

memory           = 131072
cpu              = 64000
shm_bytes        = 17179869184
healthy_deadline = "30m"
