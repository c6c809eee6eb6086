"""The video diffusion transformer; knows neither ranks nor files of a job."""
