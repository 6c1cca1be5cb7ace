# gpt-oss-120b, four GPUs that prefill. Why each value is what it is: compose/patterns/gpt-oss-120b.yaml, docs/patterns.md. Parsed and checked only.
#
#     nomad job run -var-file=nomad/patterns/gpt-oss-120b/prefill.vars.hcl nomad/prefill.nomad.hcl
image       = "baton-prefill-sglang:latest"
model       = "/models/gpt-oss-120b"
served_name = "gpt-oss-120b"
count       = 1

# The image has Baton in /opt/venv beside SGLang's own Python (BASE_IMAGE of compose/Dockerfile, docs/patterns.md). HOME: SGLang compiles kernels
# into it and loads them; the container's /tmp cannot be executed from, the task's own folder can.
engine         = "sglang"
sglang_command = "env HOME=/local PATH=/usr/local/cuda/bin:/usr/local/bin:/usr/bin:/bin python3 -m sglang.launch_server"

# Nomad gives each task GPUs of its own and hides the others: no --base-gpu-id, and no CUDA IPC between prefill and decode on one client.
# Their KV goes through the network card (GPUDirect where the card and the GPU share a switch), so rdma is not optional here.
gpus             = 4
rdma             = true
sglang_args      = "--tp-size 4 --disaggregation-transfer-backend nixl --mem-fraction-static 0.85 --chunked-prefill-size 8192"
max_chunk_tokens = 8192

# Host memory: weights pass through the page cache (61 GiB), which is not counted; processes take some 10 GiB per GPU.
memory           = 65536
cpu              = 32000
shm_bytes        = 17179869184
healthy_deadline = "20m"
