# One etcd whose data is gone when it is: enough, for it only finds instances, and its clients fill a new, empty one again within seconds.
# While it is away nothing new is found and everything that runs goes on. Who has a cluster of three uses that instead: it must be known to
# Consul as `baton-etcd`.

variable "image" {
  type    = string
  default = "quay.io/coreos/etcd:v3.5.21"
}

variable "datacenters" {
  type    = list(string)
  default = ["dc1"]
}

job "baton-etcd" {
  datacenters = var.datacenters
  type        = "service"

  group "etcd" {
    count = 1

    network {
      mode = "host"

      # Fixed: services look it up once.
      port "client" {
        static = 2379
      }

      port "peer" {}
    }

    restart {
      attempts = 10
      interval = "10m"
      delay    = "5s"
      mode     = "delay"
    }

    service {
      name     = "baton-etcd"
      provider = "consul"
      port     = "client"

      check {
        name     = "serves"
        type     = "http"
        path     = "/health"
        interval = "5s"
        timeout  = "2s"
      }
    }

    task "etcd" {
      driver       = "docker"
      kill_timeout = "10s"

      config {
        image           = var.image
        network_mode    = "host"
        readonly_rootfs = true
        cap_drop        = ["all"]
        pids_limit      = 128
        command         = "etcd"

        args = [
          "--data-dir=${NOMAD_ALLOC_DIR}/data/etcd",
          "--listen-client-urls=http://${NOMAD_ADDR_client}",
          "--advertise-client-urls=http://${NOMAD_ADDR_client}",
          "--listen-peer-urls=http://${NOMAD_ADDR_peer}",
          "--initial-advertise-peer-urls=http://${NOMAD_ADDR_peer}",
          "--initial-cluster=default=http://${NOMAD_ADDR_peer}",
          "--unsafe-no-fsync",
          "--auto-compaction-retention=1h",
        ]
      }

      resources {
        cpu    = 500
        memory = 768
      }
    }
  }
}
