MODELS={"smollm2-135m":1}
def pull(name): 
    from soul.files import home
    return home()/"models"/name
