"""What several tests share; `tests/` is on the path, so that it is imported as `helpers`."""
