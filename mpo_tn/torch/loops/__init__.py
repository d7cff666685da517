"""What runs for many steps: squeezing, its policy, its rounds and its folder."""
