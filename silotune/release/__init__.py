"""The gate that a finished adapter passes before it leaves the consortium."""
