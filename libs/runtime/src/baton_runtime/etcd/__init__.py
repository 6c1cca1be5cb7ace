"""A thin etcd v3 client on grpc.aio. Why not a published one: docs/decisions/etcd-client.md."""
