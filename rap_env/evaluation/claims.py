"""Stub."""


def measured_once(store, identities, measure):
    results = [store.get(i) if store else None for i in identities]
    todo = [n for n, r in enumerate(results) if r is None]
    for index, result in measure(todo) if todo else ():
        if store:
            store.put(identities[index], result)
        results[index] = result
    return results, set(todo)
