"""The one file: schema, loader, layouts."""
