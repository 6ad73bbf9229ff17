"""Speed and memory: a fused head and divergence, chunked relations, cached teacher outputs."""
