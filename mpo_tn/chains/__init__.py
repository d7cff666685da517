"""Cores, what is known of their form, and the algebra of chains."""
