"""Which stages run where and when: the scheduler, and the clusters it drives."""
