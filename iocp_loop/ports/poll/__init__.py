"""Driver poll: readiness, by epoll or select."""
