"""The mathematics of diffusion models. Imports torch only.

Reading order: noise_level -> schedule -> forward -> parameterization -> denoiser -> loss, then
spacing -> sampler. The letters are the papers': x_t = alpha_t x0 + sigma_t eps, t grows with noise.
"""
