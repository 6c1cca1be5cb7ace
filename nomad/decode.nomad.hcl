# Generates tokens. Scales by how long a step takes and by how full its KV pool is.
# Parsed and checked against the services' settings and against compose/; never scheduled (README.md).
#
#     nomad job run -var image=registry.example/baton-decode:0.1.0 nomad/decode.nomad.hcl

variable "image" {
  type    = string
  default = "baton-decode:latest"
}

variable "datacenters" {
  type    = list(string)
  default = ["dc1"]
}

variable "count" {
  type    = number
  default = 2
}

variable "otlp" {
  type        = string
  default     = ""
  description = "host:port that takes traces; empty: none"
}

variable "tls" {
  type        = bool
  default     = false
  description = "Mutual TLS, with certificates from the Nomad variable baton/tls/decode (README.md)"
}

variable "model" {
  type        = string
  default     = "/models/model"
  description = "Folder of the model on the client; the host volume `models` of the client must hold it"
}

variable "served_name" {
  type    = string
  default = "model"
}

variable "engine" {
  type    = string
  default = "torch"
}

variable "kv_memory_bytes" {
  type        = number
  default     = 0
  description = "KV pool; 0: what the engine takes by default"
}

variable "gpus" {
  type        = number
  default     = 0
  description = "GPUs of one instance; 0: processors only"
}

variable "rdma" {
  type        = bool
  default     = false
  description = "Hand the client's RDMA devices to the task; the docker plugin must allow ipc_lock"
}

job "baton-decode" {
  datacenters = var.datacenters
  type        = "service"

  # One at a time, a canary first: the new one must be healthy before an old one drains.
  update {
    max_parallel      = 1
    canary            = 1
    auto_promote      = true
    auto_revert       = true
    health_check      = "checks"
    min_healthy_time  = "10s"
    healthy_deadline  = "10m"
    progress_deadline = "20m"
  }

  # A node that is drained moves its instances one by one.
  migrate {
    max_parallel     = 1
    health_check     = "checks"
    min_healthy_time = "10s"
    healthy_deadline = "10m"
  }

  group "decode" {
    count = var.count

    # The Nomad autoscaler (an agent of its own) reads this; of several checks the one that wants most instances wins.
    scaling {
      enabled = true
      min     = 1
      max     = 8

      policy {
        evaluation_interval = "15s"
        cooldown            = "5m"

        # The time of a step is the time between two tokens of every stream in it. Routers predict it for each instance, what they have
        # placed there and what has not arrived yet included.
        check "inter_token" {
          source = "prometheus"

          # As for prefill: a number also while nothing runs, and at most half of the instances fewer at a time. It bounds the other check too.
          query = "clamp_min(avg(max by (instance_id) (baton_router_predicted_decode_step_seconds)) >= 0 or vector(0), 0.025)"

          strategy "target-value" {
            target = 0.05
          }
        }

        # Share of KV blocks in use. Beyond it sequences are preempted sooner or later.
        check "kv_in_use" {
          source = "prometheus"
          query  = "1 - sum(baton_kv_blocks{job='decode',state=~'free|cached'}) / sum(baton_kv_pool_blocks{job='decode'})"

          strategy "target-value" {
            target = 0.7
          }
        }
      }
    }

    network {
      mode = "host"

      port "grpc" {}

      port "kv" {}

      port "metrics" {}
    }

    restart {
      attempts = 10
      interval = "10m"
      delay    = "5s"
      mode     = "delay"
    }

    volume "models" {
      type      = "host"
      source    = "models"
      read_only = true
    }

    service {
      name     = "baton-decode"
      provider = "consul"
      port     = "grpc"
      task     = "decode"

      # With TLS a check must show a certificate, which Consul's own gRPC check cannot: the task asks itself.
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
          args     = ["-m", "baton_runtime.probe", "--tls", "/secrets/tls", "${NOMAD_ADDR_grpc}"]
          interval = "10s"
          timeout  = "6s"
        }
      }
    }

    service {
      name     = "baton-decode-metrics"
      provider = "consul"
      port     = "metrics"
      tags     = ["prometheus"]
    }

    task "decode" {
      driver = "docker"

      # The drain (30 s), what closing takes at most, and some. The client's max_kill_timeout (30 s by default) must allow it.
      kill_signal  = "SIGTERM"
      kill_timeout = "40s"

      config {
        image           = var.image
        network_mode    = "host"
        readonly_rootfs = true
        cap_drop        = ["all"]
        pids_limit      = 4096
        cap_add         = var.rdma ? ["ipc_lock"] : []

        # The image's own check asks its own ports; Consul asks the ones that are really used.
        healthchecks {
          disable = true
        }

        # KV by shared memory between the workers of a client.
        ipc_mode = "host"

        devices = var.rdma ? [{ host_path = "/dev/infiniband", container_path = "/dev/infiniband" }] : []

        # Registering memory with a network card locks it.
        ulimit {
          memlock = "-1"
          nofile  = "65536"
        }

        mount {
          type   = "tmpfs"
          target = "/tmp"
        }
      }

      volume_mount {
        volume      = "models"
        destination = "/models"
        read_only   = true
      }

      env {
        BATON_DECODE_LISTEN          = "${NOMAD_ADDR_grpc}"
        BATON_DECODE_TRANSFER_LISTEN = "${NOMAD_ADDR_kv}"
        BATON_DECODE_METRICS_LISTEN  = "${NOMAD_ADDR_metrics}"
        BATON_DECODE_INSTANCE_ID     = "decode-${NOMAD_SHORT_ALLOC_ID}"
        BATON_DECODE_ZONE            = "${node.datacenter}"
        BATON_DECODE_DRAIN_GRACE_S   = "30"
        BATON_DECODE_LOG_FORMAT      = "json"
        BATON_DECODE_OTLP_ENDPOINT   = "${var.otlp}"
        BATON_DECODE_ENGINE          = "${var.engine}"
        BATON_DECODE_MODEL           = "${var.model}"
        BATON_DECODE_SERVED_NAME     = "${var.served_name}"
        BATON_DECODE_KV_MEMORY_BYTES = "${var.kv_memory_bytes}"
        BATON_DECODE_DEVICE          = "${var.gpus > 0 ? "cuda" : "cpu"}"

        # In this order: shared memory on one client, RDMA between clients, TCP if neither works.
        BATON_DECODE_TRANSPORTS = "shm,nixl,tcp"
      }

      # Where etcd is. An address that changes is not worth a restart of everything at once: `nomad job restart` moves over in its own time.
      template {
        destination = "local/etcd.env"
        env         = true
        change_mode = "noop"
        data        = <<-EOT
          BATON_DECODE_ETCD={{ range $i, $s := service "baton-etcd" }}{{ if $i }},{{ end }}{{ $s.Address }}:{{ $s.Port }}{{ end }}
        EOT
      }

      # New files are taken at the next connection, without a restart (docs/security.md); 10001 is the user of the images.
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
        cpu    = 4000
        memory = 16384

        dynamic "device" {
          for_each = var.gpus > 0 ? [var.gpus] : []
          labels   = ["nvidia/gpu"]

          content {
            count = device.value
          }
        }
      }
    }
  }
}
