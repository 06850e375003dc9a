"""Files to numpy batches; knows neither JAX nor options."""
