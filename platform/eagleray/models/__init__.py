"""Model families: build, initialise, restore."""
