"""What a model makes of its inputs."""
