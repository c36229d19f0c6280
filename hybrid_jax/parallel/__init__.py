"""Device meshes: logical axes to mesh axes."""
