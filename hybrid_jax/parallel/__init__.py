"""Many devices: meshes, the sharding table, what passes between devices, several processes."""
