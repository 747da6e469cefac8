"""What runs beside the peers, and the peers themselves through their installed packages."""
