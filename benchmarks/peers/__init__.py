"""What our training is measured against; started by torchrun, one process per worker."""
