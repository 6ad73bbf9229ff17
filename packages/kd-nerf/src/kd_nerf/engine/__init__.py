"""Radiance fields, occupancy grids, ray marching and cameras, in plain torch."""
