"""What happens to a run that is killed, and to estimates far from theta_0."""
