# Chooses instances. Two or more: frontends use whichever answers, and place requests by themselves while none does.
# Parsed and checked against the services' settings and against compose/; never scheduled (README.md).
#
#     nomad job run -var image=registry.example/baton-router:0.1.0 nomad/router.nomad.hcl

variable "image" {
  type    = string
  default = "baton-router:latest"
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
  description = "Mutual TLS, with certificates from the Nomad variable baton/tls/router (README.md)"
}

job "baton-router" {
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
    healthy_deadline  = "2m"
    progress_deadline = "5m"
  }

  # A node that is drained moves its instances one by one.
  migrate {
    max_parallel     = 1
    health_check     = "checks"
    min_healthy_time = "10s"
    healthy_deadline = "2m"
  }

  group "router" {
    count = var.count

    network {
      mode = "host"

      port "grpc" {}

      port "metrics" {}
    }

    restart {
      attempts = 10
      interval = "10m"
      delay    = "5s"
      mode     = "delay"
    }

    service {
      name     = "baton-router"
      provider = "consul"
      port     = "grpc"
      task     = "router"

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
          task     = "router"
          command  = "python"
          args     = ["-m", "baton_runtime.probe", "--tls", "/secrets/tls", "${NOMAD_ADDR_grpc}"]
          interval = "10s"
          timeout  = "6s"
        }
      }
    }

    service {
      name     = "baton-router-metrics"
      provider = "consul"
      port     = "metrics"
      tags     = ["prometheus"]
    }

    task "router" {
      driver = "docker"

      # The drain (30 s), what closing takes at most, and some. The client's max_kill_timeout (30 s by default) must allow it.
      kill_signal  = "SIGTERM"
      kill_timeout = "40s"

      config {
        image           = var.image
        network_mode    = "host"
        readonly_rootfs = true
        cap_drop        = ["all"]
        pids_limit      = 256

        # The image's own check asks its own ports; Consul asks the ones that are really used.
        healthchecks {
          disable = true
        }

        mount {
          type   = "tmpfs"
          target = "/tmp"
        }
      }

      env {
        BATON_ROUTER_LISTEN         = "${NOMAD_ADDR_grpc}"
        BATON_ROUTER_METRICS_LISTEN = "${NOMAD_ADDR_metrics}"
        BATON_ROUTER_INSTANCE_ID    = "router-${NOMAD_SHORT_ALLOC_ID}"
        BATON_ROUTER_ZONE           = "${node.datacenter}"
        BATON_ROUTER_DRAIN_GRACE_S  = "30"
        BATON_ROUTER_LOG_FORMAT     = "json"
        BATON_ROUTER_OTLP_ENDPOINT  = "${var.otlp}"
      }

      # Where etcd is. An address that changes is not worth a restart of everything at once: `nomad job restart` moves over in its own time.
      template {
        destination = "local/etcd.env"
        env         = true
        change_mode = "noop"
        data        = <<-EOT
          BATON_ROUTER_ETCD={{ range $i, $s := service "baton-etcd" }}{{ if $i }},{{ end }}{{ $s.Address }}:{{ $s.Port }}{{ end }}
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
          data        = "{{ with nomadVar \"baton/tls/router\" }}{{ .${template.value} }}{{ end }}"
        }
      }

      dynamic "template" {
        for_each = var.tls ? ["on"] : []

        content {
          destination = "local/tls.env"
          env         = true
          change_mode = "noop"
          data        = <<-EOT
            BATON_ROUTER_TLS_CA=/secrets/tls/ca.pem
            BATON_ROUTER_TLS_CERTIFICATE=/secrets/tls/certificate.pem
            BATON_ROUTER_TLS_KEY=/secrets/tls/key.pem
          EOT
        }
      }

      resources {
        cpu    = 1000
        memory = 1024
      }
    }
  }
}
