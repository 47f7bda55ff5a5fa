"""Use a trained model: images in, label maps, probabilities and pictures out."""
