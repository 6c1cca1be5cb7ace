# gpt-oss-120b on one client with eight 80 GB GPUs: prefill on four, decode on four. The reasons of each choice are in
# compose/patterns/gpt-oss-120b.yaml; here are those of Nomad. Parsed and cross-checked; never scheduled (../README.md).
#
#     nomad job run -var image=registry.example/baton-worker-sglang:0.1.0 nomad/patterns/gpt-oss-120b.nomad.hcl
#
# etcd, frontend, router and kvtransfer are the jobs one folder up.

variable "image" {
  type        = string
  default     = "baton-worker-sglang:latest"
  description = "Target worker-sglang of compose/Dockerfile: both workers beside SGLang"
}

variable "datacenters" {
  type    = list(string)
  default = ["dc1"]
}

variable "otlp" {
  type        = string
  default     = ""
  description = "host:port that takes traces; empty: none"
}

variable "tls" {
  type        = bool
  default     = false
  description = "Mutual TLS, with certificates from the Nomad variables baton/tls/prefill and baton/tls/decode (../README.md)"
}

variable "model" {
  type        = string
  default     = "/models/gpt-oss-120b"
  description = "Folder of the model on the client; its host volume `models` must hold it"
}

variable "served_name" {
  type    = string
  default = "gpt-oss-120b"
}

job "baton-gpt-oss-120b" {
  datacenters = var.datacenters
  type        = "service"

  # No canary: it would need as many free GPUs again. The old one drains and ends, then the new one starts; meanwhile requests wait.
  update {
    max_parallel      = 1
    canary            = 0
    auto_revert       = true
    health_check      = "checks"
    min_healthy_time  = "10s"
    healthy_deadline  = "20m" # more than sglang_start_s (900 s)
    progress_deadline = "30m"
  }

  # One group, so one client: the two tasks hand KV to each other over its NVLink.
  group "workers" {
    count = 1

    network {
      mode = "host"

      port "grpc_prefill" {}

      port "kv_prefill" {}

      port "metrics_prefill" {}

      port "grpc_decode" {}

      port "kv_decode" {}

      port "metrics_decode" {}
    }

    restart {
      attempts = 10
      interval = "10m"
      delay    = "5s"
      mode     = "delay"
    }

    # Compiled kernels stay with the client for the next allocation.
    ephemeral_disk {
      sticky = true
      size   = 20000
    }

    volume "models" {
      type      = "host"
      source    = "models"
      read_only = true
    }

    service {
      name     = "baton-prefill"
      provider = "consul"
      port     = "grpc_prefill"
      task     = "prefill"

      dynamic "check" {
        for_each = var.tls ? [] : ["grpc"]

        content {
          name     = "serves"
          type     = "grpc"
          interval = "10s"
          timeout  = "5s"
        }
      }

      dynamic "check" {
        for_each = var.tls ? ["grpc over TLS"] : []

        content {
          name     = "serves"
          type     = "script"
          task     = "prefill"
          command  = "python"
          args     = ["-m", "baton_runtime.probe", "--tls", "/secrets/tls", "${NOMAD_ADDR_grpc_prefill}"]
          interval = "10s"
          timeout  = "6s"
        }
      }
    }

    service {
      name     = "baton-prefill-metrics"
      provider = "consul"
      port     = "metrics_prefill"
      tags     = ["prometheus"]
    }

    service {
      name     = "baton-decode"
      provider = "consul"
      port     = "grpc_decode"
      task     = "decode"

      dynamic "check" {
        for_each = var.tls ? [] : ["grpc"]

        content {
          name     = "serves"
          type     = "grpc"
          interval = "10s"
          timeout  = "5s"
        }
      }

      dynamic "check" {
        for_each = var.tls ? ["grpc over TLS"] : []

        content {
          name     = "serves"
          type     = "script"
          task     = "decode"
          command  = "python"
          args     = ["-m", "baton_runtime.probe", "--tls", "/secrets/tls", "${NOMAD_ADDR_grpc_decode}"]
          interval = "10s"
          timeout  = "6s"
        }
      }
    }

    service {
      name     = "baton-decode-metrics"
      provider = "consul"
      port     = "metrics_decode"
      tags     = ["prometheus"]
    }

    task "prefill" {
      driver = "docker"

      # The drain (120 s), closing (4 s) and the end of SGLang: the client's max_kill_timeout must allow it.
      kill_signal  = "SIGTERM"
      kill_timeout = "160s"

      config {
        image           = var.image
        args            = ["prefill"]
        network_mode    = "host"
        readonly_rootfs = true
        cap_drop        = ["all"]
        pids_limit      = 8192

        # One IPC namespace for both workers: without it KV does not go over NVLink, but through host memory.
        ipc_mode = "host"

        # The image's own check asks its own ports; Consul asks the ones that are really used.
        healthchecks {
          disable = true
        }

        # UCX locks what it registers; stack as in SGLang's own compose file.
        ulimit {
          memlock = "-1"
          nofile  = "65536"
          stack   = "67108864"
        }

        mount {
          type   = "tmpfs"
          target = "/tmp"
        }

        # What compilers of kernels write while they work.
        mount {
          type   = "tmpfs"
          target = "/scratch"
        }
      }

      volume_mount {
        volume      = "models"
        destination = "/models"
        read_only   = true
      }

      env {
        HOME           = "${NOMAD_ALLOC_DIR}/data"
        TMPDIR         = "/scratch"
        SGLANG_HOST_IP = "${NOMAD_IP_grpc_prefill}"

        BATON_PREFILL_LISTEN           = "${NOMAD_ADDR_grpc_prefill}"
        BATON_PREFILL_TRANSFER_LISTEN  = "${NOMAD_ADDR_kv_prefill}"
        BATON_PREFILL_METRICS_LISTEN   = "${NOMAD_ADDR_metrics_prefill}"
        BATON_PREFILL_ADVERTISE        = ""
        BATON_PREFILL_INSTANCE_ID      = "prefill-${NOMAD_SHORT_ALLOC_ID}"
        BATON_PREFILL_ZONE             = "${node.datacenter}"
        BATON_PREFILL_DRAIN_GRACE_S    = "120"
        BATON_PREFILL_LOG_FORMAT       = "json"
        BATON_PREFILL_OTLP_ENDPOINT    = "${var.otlp}"
        BATON_PREFILL_ENGINE           = "sglang"
        BATON_PREFILL_MODEL            = "${var.model}"
        BATON_PREFILL_SERVED_NAME      = "${var.served_name}"
        BATON_PREFILL_BLOCK_TOKENS     = "64"
        BATON_PREFILL_MAX_CHUNK_TOKENS = "8192"
        BATON_PREFILL_SGLANG_START_S   = "900"
        BATON_PREFILL_SGLANG_PINNED_S  = "30"

        # Why each: compose/patterns/gpt-oss-120b.yaml.
        BATON_PREFILL_SGLANG_ARGS = "--tp-size 4 --mem-fraction-static 0.82 --chunked-prefill-size 8192 --disaggregation-transfer-backend nixl --kv-cache-dtype bfloat16 --sleep-on-idle"
      }

      template {
        destination = "local/etcd.env"
        env         = true
        change_mode = "noop"
        data        = <<-EOT
          BATON_PREFILL_ETCD={{ range $i, $s := service "baton-etcd" }}{{ if $i }},{{ end }}{{ $s.Address }}:{{ $s.Port }}{{ end }}
        EOT
      }

      dynamic "template" {
        for_each = var.tls ? ["ca", "certificate", "key"] : []

        content {
          destination = "secrets/tls/${template.value}.pem"
          change_mode = "noop"
          perms       = "0600"
          uid         = 10001
          gid         = 10001
          data        = "{{ with nomadVar \"baton/tls/prefill\" }}{{ .${template.value} }}{{ end }}"
        }
      }

      dynamic "template" {
        for_each = var.tls ? ["on"] : []

        content {
          destination = "local/tls.env"
          env         = true
          change_mode = "noop"
          data        = <<-EOT
            BATON_PREFILL_TLS_CA=/secrets/tls/ca.pem
            BATON_PREFILL_TLS_CERTIFICATE=/secrets/tls/certificate.pem
            BATON_PREFILL_TLS_KEY=/secrets/tls/key.pem
          EOT
        }
      }

      resources {
        cpu    = 32000
        memory = 262144

        # --tp-size. Nomad gives each task GPUs of its own; inside they are 0 to 3.
        device "nvidia/gpu" {
          count = 4
        }
      }
    }

    task "decode" {
      driver = "docker"

      # The drain (120 s), closing (4 s) and the end of SGLang: the client's max_kill_timeout must allow it.
      kill_signal  = "SIGTERM"
      kill_timeout = "160s"

      config {
        image           = var.image
        args            = ["decode"]
        network_mode    = "host"
        readonly_rootfs = true
        cap_drop        = ["all"]
        pids_limit      = 8192

        # One IPC namespace for both workers: without it KV does not go over NVLink, but through host memory.
        ipc_mode = "host"

        # The image's own check asks its own ports; Consul asks the ones that are really used.
        healthchecks {
          disable = true
        }

        # UCX locks what it registers; stack as in SGLang's own compose file.
        ulimit {
          memlock = "-1"
          nofile  = "65536"
          stack   = "67108864"
        }

        mount {
          type   = "tmpfs"
          target = "/tmp"
        }

        # What compilers of kernels write while they work.
        mount {
          type   = "tmpfs"
          target = "/scratch"
        }
      }

      volume_mount {
        volume      = "models"
        destination = "/models"
        read_only   = true
      }

      env {
        HOME           = "${NOMAD_ALLOC_DIR}/data"
        TMPDIR         = "/scratch"
        SGLANG_HOST_IP = "${NOMAD_IP_grpc_decode}"

        BATON_DECODE_LISTEN          = "${NOMAD_ADDR_grpc_decode}"
        BATON_DECODE_TRANSFER_LISTEN = "${NOMAD_ADDR_kv_decode}"
        BATON_DECODE_METRICS_LISTEN  = "${NOMAD_ADDR_metrics_decode}"
        BATON_DECODE_ADVERTISE       = ""
        BATON_DECODE_INSTANCE_ID     = "decode-${NOMAD_SHORT_ALLOC_ID}"
        BATON_DECODE_ZONE            = "${node.datacenter}"
        BATON_DECODE_DRAIN_GRACE_S   = "120"
        BATON_DECODE_LOG_FORMAT      = "json"
        BATON_DECODE_OTLP_ENDPOINT   = "${var.otlp}"
        BATON_DECODE_ENGINE          = "sglang"
        BATON_DECODE_MODEL           = "${var.model}"
        BATON_DECODE_SERVED_NAME     = "${var.served_name}"
        BATON_DECODE_BLOCK_TOKENS    = "64"
        BATON_DECODE_SGLANG_START_S  = "900"
        BATON_DECODE_SGLANG_PINNED_S = "30"

        # Handed-over prompts only: no GPU is left over for whole requests.
        BATON_DECODE_CAN_PREFILL = "false"

        # Why each: compose/patterns/gpt-oss-120b.yaml.
        BATON_DECODE_SGLANG_ARGS = "--tp-size 4 --mem-fraction-static 0.86 --max-running-requests 256 --cuda-graph-max-bs-decode 256 --num-reserved-decode-tokens 512 --disaggregation-transfer-backend nixl --kv-cache-dtype bfloat16 --sleep-on-idle"
      }

      template {
        destination = "local/etcd.env"
        env         = true
        change_mode = "noop"
        data        = <<-EOT
          BATON_DECODE_ETCD={{ range $i, $s := service "baton-etcd" }}{{ if $i }},{{ end }}{{ $s.Address }}:{{ $s.Port }}{{ end }}
        EOT
      }

      dynamic "template" {
        for_each = var.tls ? ["ca", "certificate", "key"] : []

        content {
          destination = "secrets/tls/${template.value}.pem"
          change_mode = "noop"
          perms       = "0600"
          uid         = 10001
          gid         = 10001
          data        = "{{ with nomadVar \"baton/tls/decode\" }}{{ .${template.value} }}{{ end }}"
        }
      }

      dynamic "template" {
        for_each = var.tls ? ["on"] : []

        content {
          destination = "local/tls.env"
          env         = true
          change_mode = "noop"
          data        = <<-EOT
            BATON_DECODE_TLS_CA=/secrets/tls/ca.pem
            BATON_DECODE_TLS_CERTIFICATE=/secrets/tls/certificate.pem
            BATON_DECODE_TLS_KEY=/secrets/tls/key.pem
          EOT
        }
      }

      resources {
        cpu    = 32000
        memory = 262144

        # --tp-size. Nomad gives each task GPUs of its own; inside they are 0 to 3.
        device "nvidia/gpu" {
          count = 4
        }
      }
    }
  }
}
