"""What an image classifier sees: activations, similarities, retention of the class."""
