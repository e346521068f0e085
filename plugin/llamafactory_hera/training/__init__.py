"""The HeRA term of a training step: from head representations and teacher features to a loss; knows no host."""
