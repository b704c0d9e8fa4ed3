"""x"""
def why_not(): return "no"
def preloaded(e): return {}
