"""The mathematics of diffusion models. Imports torch only.

Reading order: noise_level -> schedule -> forward -> parameterization -> denoiser -> loss, then
spacing -> sampler. Notation: x_t = alpha_t x0 + sigma_t eps; the noise increases with t.
"""
