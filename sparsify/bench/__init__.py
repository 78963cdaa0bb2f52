"""Where sparse wins and where it loses: a checkpoint's layers and the whole model, timed against dense ones."""
