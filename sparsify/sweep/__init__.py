"""Quality against measured speed over block shapes and sparsities."""
