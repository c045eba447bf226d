"What a committed notebook shows and says, for the tests of its claims."
import ast


def printed(nb):
    "All text that the code cells gave."
    outputs = [o for c in nb.cells if c.cell_type == 'code' for o in c.outputs]
    return '\n'.join(o.get('text') or o.data.get('text/html', '')+o.data.get('text/plain', '') for o in outputs)


def prose(nb): return '\n'.join(c.source for c in nb.cells if c.cell_type == 'markdown')


def result_of(nb):
    "The value of a tutorial's last dict, `result`."
    return next(ast.literal_eval(c.outputs[0].data['text/plain']) for c in nb.cells if c.source.startswith('result = '))
