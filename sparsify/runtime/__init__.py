"""What surrounds a long run: one run a folder, several processes, interruptions, progress, files of its state."""
