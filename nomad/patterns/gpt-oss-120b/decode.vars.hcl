# gpt-oss-120b, four GPUs that decode. Why each value is what it is: prefill.vars.hcl, compose/patterns/gpt-oss-120b.yaml. Parsed and checked only.
#
#     nomad job run -var-file=nomad/patterns/gpt-oss-120b/decode.vars.hcl nomad/decode.nomad.hcl
image       = "baton-decode-sglang:latest"
model       = "/models/gpt-oss-120b"
served_name = "gpt-oss-120b"
count       = 1

# The image has Baton in /opt/venv beside SGLang's own Python (BASE_IMAGE of compose/Dockerfile, docs/patterns.md). HOME: SGLang compiles kernels
# into it and loads them; the container's /tmp cannot be executed from, the task's own folder can.
engine         = "sglang"
sglang_command = "env HOME=/local PATH=/usr/local/cuda/bin:/usr/local/bin:/usr/bin:/bin python3 -m sglang.launch_server"

gpus        = 4
rdma        = true
can_prefill = false
sglang_args = "--tp-size 4 --disaggregation-transfer-backend nixl --mem-fraction-static 0.85 --num-reserved-decode-tokens 512"

memory           = 65536
cpu              = 32000
shm_bytes        = 17179869184
healthy_deadline = "20m"
