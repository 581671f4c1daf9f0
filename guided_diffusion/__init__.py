"""Forward-backward diffusion: noise an image up to a chosen time, denoise it back, measure what survived."""
