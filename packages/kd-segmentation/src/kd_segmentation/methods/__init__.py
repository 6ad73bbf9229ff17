"""One file per paper: losses, distiller, stages."""
