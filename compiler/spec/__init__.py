"""How a value lies on a mesh: mesh, layouts, rank numbers, and the ways between layouts."""
