"""Whatever stays up: model replicas, the edge application and their front."""
