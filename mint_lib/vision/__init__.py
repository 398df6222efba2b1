"""What looks at images: networks and measurements that teachers, students and baselines share."""
