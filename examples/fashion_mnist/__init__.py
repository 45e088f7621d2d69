"""Two small Fashion-MNIST classifiers, their checkpoints, and images to calibrate and judge them with."""
