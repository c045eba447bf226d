"""The documentation as a site in _docs: pages from the notebooks, API entries from docments, search. python tools/docs.py [--serve]

mkdocs renders; nothing is run: a page shows the outputs that its notebook holds. Where the program Quarto is installed,
`make docs-quarto` renders the same notebooks by nbdev's own route."""
import base64, html, importlib, inspect, os, re, shutil, subprocess, sys
from configparser import ConfigParser
from pathlib import Path
import nbformat, yaml
from nbdev.showdoc import DocmentTbl

ROOT = Path(__file__).resolve().parent.parent
NBS, WORK, SITE = ROOT/'nbs', ROOT/'_proc', ROOT/'_docs'
ini = ConfigParser(delimiters=['='])
ini.read(ROOT/'settings.ini')
CFG = ini['DEFAULT']
BLOB = f"{CFG['git_url']}/blob/{CFG['branch']}"
PAGES = ['coming_from', 'options', 'glossary', 'limits']
SECTIONS = {'Tutorials': sorted((NBS/'tutorials').glob('*.ipynb')), 'Guides': [NBS/f'{p}.ipynb' for p in PAGES], 'API': sorted((NBS/'api').glob('*.ipynb'))}


def directives(cell):
    "The words of a cell's `#|` lines, and its source without them."
    lines = cell.source.splitlines()
    return {w for l in lines if l.startswith('#|') for w in l[2:].split()}, '\n'.join(l for l in lines if not l.startswith('#|')).strip('\n')


def module_of(nb):
    "The module that a notebook exports; None for a tutorial or a page."
    name = next((m[1] for c in nb.cells if (m := re.search(r'^#\| *default_exp +(\S+)', c.source, re.M))), None)
    return importlib.import_module(f'lora_nb.{name}') if name else None


def public(module): return getattr(module, '__all__', [])


# -- API entries --------------------------------------------------------------------------------------------------------------

def entry(module, name):
    "Markdown for one public name: signature, docstring, docments table, public methods."
    obj = getattr(module, name)
    if not (inspect.isclass(obj) or inspect.isroutine(obj)): return f'### {name} {{#{name}}}\n\n```python\n{name} = {short(obj)}\n```\n'
    return described(obj, name, 3) + ''.join(described(m, f'{name}.{k}', 4) for k, m in methods(obj))


def short(obj, most=300):
    text = re.sub(r' at 0x[0-9a-f]+', '', repr(obj))
    return text if len(text) <= most else text[:most]+' …'


def methods(cls):
    "Public methods of a class that this package wrote and documented."
    if not inspect.isclass(cls): return []
    return [(k, f) for k, f in vars(cls).items() if not k.startswith('_') and inspect.isfunction(f) and f.__module__.startswith('lora_nb') and f.__doc__]


def described(obj, name, level):
    doc = inspect.getdoc(obj) if obj.__doc__ else ''
    try: signature = re.sub(r' at 0x[0-9a-f]+', '', f'{name.split(".")[-1]}{inspect.signature(obj)}')
    except (TypeError, ValueError): signature = name
    signature = re.sub(r"<class '(?:\w+\.)*(\w+)'>|\b(?:torch\.nn\.modules\.module|torch\.nn|pandas|pandas\.core\.frame|torch)\.(?=[A-Z])", lambda m: m[1] or '', signature)
    if len(signature) > 100: signature = re.sub(r', (?=\w+\s*[:=,)]|\*)', ',\n    ', signature.replace('(', '(\n    ', 1))
    return f'{"#"*level} {name} {{#{name}}}\n\n```python\n{signature}\n```\n\n{doc}\n\n{table(obj)}\n\n{source_link(obj)}\n\n'


def table(obj):
    "The docments table; empty where no parameter says anything."
    try: found = DocmentTbl(obj)
    except Exception: return ''                     # a class without an __init__ of its own
    return found._repr_markdown_().replace('{', '&#123;') if found.has_docment else ''


def source_link(obj):
    try: file, line = Path(inspect.getsourcefile(inspect.unwrap(obj))).resolve(), inspect.getsourcelines(inspect.unwrap(obj))[1]
    except (TypeError, OSError): return ''
    return f'[on GitHub]({BLOB}/{file.relative_to(ROOT)}#L{line})' if file.is_relative_to(ROOT) else ''


# -- notebooks as Markdown ----------------------------------------------------------------------------------------------------

def fenced(text, kind): return f'```{kind}\n{text.rstrip()}\n```\n'


def output(out, folder, name):
    "One output as Markdown; a picture is written beside the page."
    data = out.get('data', {})
    if out.output_type == 'stream': return '' if out.name == 'stderr' else fenced(out.text, 'text')
    if 'image/png' in data:
        (folder/f'{name}.png').write_bytes(base64.b64decode(data['image/png']))
        return f'![]({name}.png)\n'
    if 'text/html' in data: return '<div class="output">'+re.sub(r'<style.*?</style>', '', data['text/html'], flags=re.S).replace('\n', ' ')+'</div>\n'
    return fenced(data['text/plain'], 'text') if 'text/plain' in data else ''


def code(cell, module, seen):
    "A code cell: an exported one is its entries and its folded source."
    said, source = directives(cell)
    if 'hide' in said or 'default_exp' in said or not source: return ''
    if not said & {'export', 'exporti'}: return fenced(source, 'python')
    new = [n for n in public(module) if n not in seen and re.search(rf'^(?:def|class|async def) {n}\b|^{n}\s*(?::[^=\n]+)?=|^(?:\w+,)*{n}(?:,\w+)*\s*=', source, re.M)]
    seen |= set(new)
    folded = '??? quote "source"\n\n' + ''.join(f'    {l}\n' for l in fenced(source, 'python').splitlines())
    return ''.join(entry(module, n) for n in new) + '\n' + folded


def page(path, folder):
    "A notebook as Markdown."
    nb, parts, seen = nbformat.read(path, as_version=4), [], set()
    module = module_of(nb)
    for i, cell in enumerate(nb.cells):
        if cell.cell_type == 'markdown': parts.append(cell.source+'\n')
        elif cell.cell_type == 'code':
            parts.append(code(cell, module, seen))
            if parts[-1]: parts += [output(o, folder, f'{path.stem}-{i}-{k}') for k, o in enumerate(cell.outputs)]
    if module and (left := [n for n in public(module) if n not in seen]): parts.append('## And\n\n'+''.join(entry(module, n) for n in left))
    return side_by_side('\n'.join(p for p in parts if p))


def side_by_side(text):
    "Two cells that begin `# PEFT + TRL` and `# lora_nb`, with what they print, become two columns."
    block = lambda first: rf'```python\n# {first}\n(?:(?!```).*\n)*?```\n(?:\n```text\n(?:(?!```).*\n)*?```\n|\n<div class="output">.*</div>\n)*'
    pair = re.compile(f"({block('PEFT . TRL')})\n({block('lora_nb')})")
    return pair.sub(lambda m: f'<div class="pair" markdown>\n<div markdown>\n\n{m[1]}\n</div>\n<div markdown>\n\n{m[2]}\n</div>\n</div>\n', text)


# -- links --------------------------------------------------------------------------------------------------------------------

def outside_code(text, change):
    "Apply `change` to the text between code blocks."
    return ''.join(part if part.startswith('```') else change(part) for part in re.split(r'(^ *```.*?^ *```$)', text, flags=re.M | re.S))


def link(target, path, placed):
    "Where a link of the notebook at `path` leads on the site: a page, or the file on GitHub."
    if re.match(r'\w+:|#', target): return target
    file, _, anchor = target.partition('#')
    real = (path.parent/file).resolve()
    if real in placed: return relative(placed[real], placed[path]) + (f'#{anchor}' if anchor else '')
    return target if real.suffix in ('.png', '.gif') and (WORK/'pages'/real.relative_to(NBS)).exists() else f'{BLOB}/{real.relative_to(ROOT)}'


def relative(to, start):
    return os.path.relpath(to, start.parent).replace(os.sep, '/')


def linked(text, path, placed, names):
    "Links to notebooks lead to pages; a public name in backticks leads to its entry."
    def known(m):
        name = m[1].rpartition('.')[2] if m[1].startswith('lora_nb.') else m[1]
        return f'[`{m[1]}`]({relative(names[name], placed[path])}#{name})' if name in names else m[0]
    def change(part):
        part = re.sub(r'(?<!!)\]\(([^)\s]+)\)', lambda m: f']({link(m[1], path, placed)})', part)
        return re.sub(r'(?<![\[`#])`([A-Za-z_][\w.]*)`(?![\]`])', known, part)
    return outside_code(text, change)


def reference(names_of):
    "Every public name, by module, with the first line of its docstring."
    lines = ['# Every public name\n']
    for stem, module in names_of.items():
        if not public(module): continue
        lines += [f'\n## {module.__name__}\n', '| name | |', '|---|---|']
        for n in public(module):
            obj = getattr(module, n)
            doc = (inspect.getdoc(obj) or '').split('\n')[0] if inspect.isclass(obj) or inspect.isroutine(obj) else ''
            lines.append(f'| [{n}]({stem}.md#{n}) | {html.escape(doc, quote=False).replace("|", "&#124;")} |')
    return '\n'.join(lines)+'\n'


# -- the site -----------------------------------------------------------------------------------------------------------------

STYLE = """.output { overflow-x: auto; font-size: .7rem; margin-bottom: 1em } .output table { border-collapse: collapse } .output td, .output th { padding: .2em .6em; text-align: left }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 0 1rem } .pair > div { min-width: 0 } .md-grid { max-width: 75rem }
.md-typeset h3[id], .md-typeset h4[id] { font-family: var(--md-code-font-family, monospace) }
"""


def config(nav):
    palette = [dict(media='(prefers-color-scheme: light)', scheme='default', primary='indigo', toggle=dict(icon='material/weather-night', name='Dark')),
               dict(media='(prefers-color-scheme: dark)', scheme='slate', primary='indigo', toggle=dict(icon='material/weather-sunny', name='Light'))]
    return dict(site_name=CFG['title'], site_description=CFG['description'], site_url=f"{CFG['doc_host']}{CFG['doc_baseurl']}/", repo_url=CFG['git_url'], edit_uri='',
                docs_dir=str(WORK/'pages'), site_dir=str(SITE), copyright=CFG['copyright'], plugins=['search'], nav=nav, extra_css=['style.css'], use_directory_urls=False,
                theme=dict(name='material', font=False, palette=palette, features=['search.suggest', 'search.highlight', 'content.code.copy', 'navigation.tabs', 'navigation.top', 'toc.follow']),
                validation=dict(links=dict(not_found='warn', anchors='warn', absolute_links='warn', unrecognized_links='warn'), nav=dict(omitted_files='info')),
                markdown_extensions=['tables', 'attr_list', 'md_in_html', 'admonition', 'pymdownx.superfences', 'pymdownx.details', 'pymdownx.highlight', dict(toc=dict(permalink=True))])


def write():
    "The pages as Markdown, and mkdocs' settings."
    shutil.rmtree(WORK/'pages', ignore_errors=True)
    pages = WORK/'pages'
    (pages/'images').mkdir(parents=True)
    for f in (NBS/'images').glob('*'): shutil.copy(f, pages/'images')
    placed = {NBS/'index.ipynb': pages/'index.md'} | {p: pages/p.relative_to(NBS).with_suffix('.md') for ps in SECTIONS.values() for p in ps}
    modules = {p.stem: m for p in SECTIONS['API'] if (m := module_of(nbformat.read(p, as_version=4))) and m.__name__ != 'lora_nb.all'}
    names = {n: pages/f'api/{stem}.md' for stem, m in modules.items() for n in public(m)}
    for path, to in placed.items():
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(linked(page(path, to.parent), path, placed, names), encoding='utf-8')
    (pages/'api/index.md').write_text(reference(modules), encoding='utf-8')
    (pages/'style.css').write_text(STYLE)
    nav = [{'Home': 'index.md'}, *({name: [*(['api/index.md'] if name == 'API' else []), *(str(placed[p].relative_to(pages)) for p in ps)]} for name, ps in SECTIONS.items())]
    (WORK/'mkdocs.yml').write_text(yaml.safe_dump(config(nav), allow_unicode=True))


if __name__ == '__main__':
    sys.path.insert(0, str(ROOT))
    write()
    if '--serve' in sys.argv: subprocess.run([sys.executable, '-m', 'mkdocs', 'serve', '-f', str(WORK/'mkdocs.yml')], check=True)
    else: sys.exit(subprocess.run([sys.executable, '-m', 'mkdocs', 'build', '--strict', '--quiet', '-f', str(WORK/'mkdocs.yml')], env=os.environ | {'NO_MKDOCS_2_WARNING': '1'}).returncode)
