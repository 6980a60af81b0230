"""The store: objects, manifests, commits, references, runs."""
