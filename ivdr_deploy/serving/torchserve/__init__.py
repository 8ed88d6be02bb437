"""What only TorchServe needs: the archive, its settings files, its process."""
