"""How well estimates, and the gradients that they are made of, agree with what is true."""
