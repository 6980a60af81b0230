"""Verbs as Ray jobs: what is shipped, how they are started and stopped, and our own record of them."""
