"""The gRPC contracts between Baton's services: protos, stubs, descriptor image."""
