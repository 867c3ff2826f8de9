"""The stages: Ray Data, Ray Train and Ray Serve around llada/. A stage reads folders and writes one folder."""
