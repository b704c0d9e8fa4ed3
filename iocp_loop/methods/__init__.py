"""The methods of the loop, by family: each class is a mixin of IocpEventLoop."""
