"""Mathematics that methods of 3D detection share: bird's-eye-view maps, boxes on them, tapped detectors."""
