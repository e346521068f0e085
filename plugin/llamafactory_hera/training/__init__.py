"""The alignment term of a training step: from representations and teacher features to a loss; knows no host."""
